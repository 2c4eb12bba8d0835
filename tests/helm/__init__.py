"""The chart and the image, shown by the tools that people use them with."""
