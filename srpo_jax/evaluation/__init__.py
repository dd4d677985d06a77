"""Whether alignment worked: scores of pictures, and what they say."""
