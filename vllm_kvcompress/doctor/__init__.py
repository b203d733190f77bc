"""Would a server start, and what would it save?"""
