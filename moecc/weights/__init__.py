"""moecc.weights"""
