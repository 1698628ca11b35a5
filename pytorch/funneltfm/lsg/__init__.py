"""LSG attention: local blocks, a sparse summary of what lies around them, and global tokens, for pretrained models.

Condevaux and Harispe: LSG Attention: Extrapolation of pretrained Transformers to long sequences (2022).
"""
