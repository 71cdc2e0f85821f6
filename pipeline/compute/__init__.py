"""The machine and how it multiplies: device, precision, emulated formats, speed."""
