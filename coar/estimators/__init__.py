"""Estimators: from a campaign, or from a model, to one linear attribution per example."""
