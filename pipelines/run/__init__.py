"""A run directory: trained in, saved, resumed, grown, loaded, tested, exported."""
