"""The bus: topics, message types, a client session, and the broker that a local run starts for itself."""
