"""Callbacks for training libraries. Each module needs its library, and nothing is imported before it is asked for.

lightning       Watch, Freeze, Recalibrate (extra "lightning")
transformers    Watch, Freeze, Recalibrate (extra "transformers")
"""
