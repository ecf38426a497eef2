"""CLaMP's encoders of symbolic music (M3, CLaMP 2, CLaMP 3) as judges of style and of fit to a text."""

from fastsmart.reward.clamp3.reader import MusicReader
from fastsmart.reward.clamp3.reward import ClampScore, ClampStyle, ClampText
from fastsmart.reward.clamp3.styles import RealStyles, StylesAbout

__all__ = ["ClampScore", "ClampStyle", "ClampText", "MusicReader", "RealStyles", "StylesAbout"]
