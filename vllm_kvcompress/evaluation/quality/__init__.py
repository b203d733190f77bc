"""`kvcompress eval`: does a model still answer right under a compressed cache?"""
