"""The rules of sampling, and a step of many canvases on the device."""
