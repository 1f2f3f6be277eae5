"""From a JSON schema to a grammar of the values that it allows, in JSON or in Gemma's notation of calls."""
