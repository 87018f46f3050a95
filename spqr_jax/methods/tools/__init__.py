"""What several methods share: the training loop, images to learn from, closed forms, masks, adapters, attention maps.

A tool knows backbones, training and sampling. It knows no method.
"""
