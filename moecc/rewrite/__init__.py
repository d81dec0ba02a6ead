"""moecc.rewrite"""
