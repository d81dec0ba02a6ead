"""Multi-process runs: process numbers, supervision, and templates for clusters."""
