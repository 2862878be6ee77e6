"""Encoders and heads that stay pure functions under torch.func: no dropout, nothing written in place."""

from metacal.nets.autoencoder import MaskedAutoencoder as MaskedAutoencoder
from metacal.nets.autoencoder import MaskedDecoder as MaskedDecoder
from metacal.nets.autoencoder import Reconstruction as Reconstruction
from metacal.nets.autoencoder import random_order as random_order
from metacal.nets.conv import ConvEncoder as ConvEncoder
from metacal.nets.mlp import MLP as MLP
from metacal.nets.prototypes import Prototypes as Prototypes
from metacal.nets.resnet import ResNet18 as ResNet18
from metacal.nets.vit import ViT as ViT
