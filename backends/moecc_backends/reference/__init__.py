"""moecc_backends.reference"""
