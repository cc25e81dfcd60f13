"""Telling the end of a job to the address that its order named."""

from serve.webhooks.addresses import check_webhook
from serve.webhooks.deliverer import Deliverer, Pace

__all__ = ["Deliverer", "Pace", "check_webhook"]
