"""moecc.families"""
