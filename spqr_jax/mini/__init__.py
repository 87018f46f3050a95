"""The embedded world: a small text-to-image benchmark on emoji that ships with the project.

``fetch`` gets the pinned packages, ``pack`` turns them into the shipped assets, ``catalogue`` reads names, ``world``
defines objects, captions and prompts, ``emoji`` renders pictures.
"""
