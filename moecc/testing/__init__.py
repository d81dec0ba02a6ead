"""moecc.testing"""
