"""Speed of the engine, beside the roofline of the machine and beside others."""
