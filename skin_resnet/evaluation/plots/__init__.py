"""Every figure: the only place that imports matplotlib."""
