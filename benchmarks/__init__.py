"""Measurements that anyone can run again: each writes its figures as JSON, and its tables and plots from that JSON."""
