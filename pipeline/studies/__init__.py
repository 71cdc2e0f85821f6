"""What the numbers teach: initialisation, number formats, roofline."""
