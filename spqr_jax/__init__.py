"""spqr-jax: does a safety-aligned text-to-image model stay safe when someone fine-tunes it on harmless pictures?"""

__version__ = "0.1.0"
