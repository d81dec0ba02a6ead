"""moecc.checkpoint"""
