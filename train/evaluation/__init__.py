"""The measurements of a trained model: loss by position, retrieval, stages before and after."""
