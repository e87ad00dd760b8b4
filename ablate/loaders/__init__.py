"""What each source of models and data needs: the one place that knows the heavy packages, imported when used."""
