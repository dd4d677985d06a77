"""What models draw, measured: pictures from fixed noise, scores of each, what they say and how surely, and the page."""
