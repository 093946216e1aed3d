"""Video models, registered in timm: after ``import video.models`` use ``timm.create_model(name)``."""

from video.models import registry

__all__ = ["registry"]
