"""Looking at models and methods: what is kept, what it costs, which methods there are."""
