"""The Python surface: `moecc.open` and the model that it returns."""
