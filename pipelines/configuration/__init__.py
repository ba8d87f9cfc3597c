"""Every choice that can change a number, as plain values, and the methods that there are to choose from."""
