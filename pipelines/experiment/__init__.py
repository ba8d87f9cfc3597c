"""All that is made of a configuration before the first round: data, model, methods, plan, memory."""
