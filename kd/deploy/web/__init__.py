"""The web page of an export: the model and onnxruntime-web in one HTML file, or in a folder for a static server."""
