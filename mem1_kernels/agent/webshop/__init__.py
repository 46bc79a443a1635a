"""WebShop in text (arXiv 2207.01206): a procedural shop in this process, or a real server."""

from mem1_kernels.agent.webshop.catalogue import Product
from mem1_kernels.agent.webshop.environment import ShopSite, Site, View, WebShop
from mem1_kernels.agent.webshop.server import RemoteSite
from mem1_kernels.agent.webshop.shop import Goal, Reward, Shop, reward

__all__ = [
    "Goal",
    "Product",
    "RemoteSite",
    "Reward",
    "Shop",
    "ShopSite",
    "Site",
    "View",
    "WebShop",
    "reward",
]
