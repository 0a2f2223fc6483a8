"""Real parts and pictures that packages of others carry: fetched by the user's own package managers, never shipped here."""
