"""Looking at what was trained, and at what it costs."""
