"""moecc.ir"""
