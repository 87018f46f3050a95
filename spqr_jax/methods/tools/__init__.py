"""What several methods share: training loops, images to learn from, parts of a denoiser, and closed-form edits.

A tool may know whatever a method may. It knows no method: what only one of them needs is in that method's file.
"""
