"""What clients' models know, taught to the global model on data that the server holds."""
