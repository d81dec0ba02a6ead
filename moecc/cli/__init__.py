"""moecc.cli"""
