"""moecc.pipeline"""
