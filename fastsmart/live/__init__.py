"""The page that plays, listens, and has a policy trained on what a listener likes: `fastsmart live`."""
