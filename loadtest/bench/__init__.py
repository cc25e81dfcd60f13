"""`tandem bench compare | service | cache | soak`: Tandem beside others, beside its bare engine, and over time."""
