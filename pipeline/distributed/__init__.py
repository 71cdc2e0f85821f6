"""Several processes that train one model: started or joined, led by the first, ended together."""
