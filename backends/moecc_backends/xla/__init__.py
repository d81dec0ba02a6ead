"""moecc_backends.xla"""
