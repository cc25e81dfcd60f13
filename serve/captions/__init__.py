"""Pictures -> words: what `POST /v1/captions` stands on, without the framework that carries it."""
