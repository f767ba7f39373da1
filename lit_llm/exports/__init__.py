"""Exports: model folders that other libraries load, with the proof that they are the model that was trained."""
