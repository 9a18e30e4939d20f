"""timm's part of the zoo: named architectures, shortened where timm accepts it, at the smallest image that works."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.scripts.zoo import Adds, Entry, images


def timm_entry(name: str, size: int, *, arch: str = "", note: str = "", options: Any = None, **adds: Adds) -> Entry:
    """An entry for `timm.create_model(arch or name, **options)` on images of `size` pixels."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(arch or name, pretrained=False, num_classes=10, **(options or {}))

    return Entry(f"timm/{name}", make, images(size), tuple(adds.items()), note)


def class_entry(name: str, size: int, module: str, cls: str, *, options: Any, note: str = "", **adds: Adds) -> Entry:
    """An entry for a timm class itself, where `create_model` does not let its size be changed."""

    def make() -> nn.Module:
        import importlib

        home = importlib.import_module(f"timm.models.{module}")
        resolved = {key: getattr(home, value[1:]) if _is_reference(value) else value for key, value in options.items()}
        return getattr(home, cls)(num_classes=10, **resolved)

    return Entry(f"timm/{name}", make, images(size), tuple(adds.items()), note)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")  # "@ResBlock" is the class of that name in the same module


_SMALL = {"img_size": 32, "depth": 3, "embed_dim": 96, "num_heads": 3}
_STAGES = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}

ENTRIES: tuple[Entry, ...] = (
    # Convolutional networks. A projection shortcut counts like an identity.
    timm_entry("test_resnet", 64, BasicBlock=1, Bottleneck=1),
    timm_entry("resnet18", 64, BasicBlock=1),
    timm_entry("resnet50", 64, Bottleneck=1),
    timm_entry("resnetv2_50", 64, PreActBottleneck=1),
    timm_entry("resnext50", 64, arch="resnext50_32x4d", Bottleneck=1),
    timm_entry("seresnet18", 64, BasicBlock=1),
    timm_entry("regnety_002", 64, Bottleneck=1),
    timm_entry(
        "res2net50", 64, arch="res2net50_26w_4s", Bottle2neck=1, note="sums of neighbouring scales do not count"
    ),
    timm_entry("densenet121", 64),
    class_entry(
        "vgg",
        64,
        "vgg",
        "VGG",
        options={"cfg": [16, "M", 32, "M", 64, 64, "M"], "mlp_ratio": 0.02, "norm_layer": nn.BatchNorm2d},
    ),
    timm_entry("mobilenetv2_050", 64, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    timm_entry("mobilenetv3_small_050", 64, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    timm_entry("mobilenetv4_conv_small", 64, UniversalInvertedResidual="has_skip", ConvBnAct="has_skip"),
    timm_entry("efficientnet_b0", 64, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    timm_entry("efficientnetv2_rw_t", 64, InvertedResidual="has_skip", EdgeResidual="has_skip", ConvBnAct="has_skip"),
    timm_entry(
        "convnext_pico",
        64,
        arch="test_convnext",
        options={"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
        ConvNeXtBlock=1,
    ),
    timm_entry("convnext_atto", 64, ConvNeXtBlock=1),
    timm_entry("convnextv2_atto", 64, ConvNeXtBlock=1),
    timm_entry("test_nfnet", 64, NormFreeBlock=1),
    timm_entry("nfnet_l0", 64, NormFreeBlock=1),
    timm_entry("repvit_m0_9", 64, RepVggDw=2, RepViTBlock=1, RepVitDownsample=1, note="RepVggDw: conv + conv1 + x"),
    timm_entry(
        "fastvit_t8", 64, RepMixerBlock=1, RepMixer=1, note="parallel convolutions of MobileOneBlock do not count"
    ),
    timm_entry("ghostnet_050", 64, GhostBottleneck=1),
    timm_entry("hrnet_w18_small", 64, Bottleneck=1, BasicBlock=1, note="sums over resolutions do not count"),
    timm_entry("dla34", 64, DlaBasic=1),
    timm_entry("ese_vovnet39b", 64, OsaBlock="residual"),
    timm_entry("inception_next_atto", 64, MetaNeXtBlock=1),
    timm_entry("rexnet_100", 64, note="its sums cover a part of the channels; the branch makes the others"),
    timm_entry("mambaout_femto", 64, GatedConvBlock=1),
    # Transformers on images.
    timm_entry(
        "vit_pico",
        32,
        arch="vit_tiny_patch16_224",
        options={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        Block=2,
    ),
    timm_entry("vit_tiny", 32, arch="vit_tiny_patch16_224", options={"img_size": 32, "depth": 3}, Block=2),
    timm_entry(
        "deit_tiny_distilled", 32, arch="deit_tiny_distilled_patch16_224", options={"img_size": 32, "depth": 3}, Block=2
    ),
    timm_entry("vit_reg4", 28, arch="vit_small_patch14_reg4_dinov2", options={"img_size": 28, "depth": 3}, Block=2),
    timm_entry(
        "vit_siglip",
        32,
        arch="vit_base_patch16_siglip_224",
        options=_SMALL,
        Block=2,
        AttentionPoolLatent=1,
        note="the pooling head has an MLP branch",
    ),
    timm_entry("vit_clip", 32, arch="vit_base_patch16_clip_224", options=_SMALL, Block=2),
    timm_entry(
        "vit_parallel",
        32,
        arch="vit_small_patch16_18x2_224",
        options={**_SMALL, "depth": 2},
        ParallelThingsBlock=2,
        note="each branch is a stack of two",
    ),
    timm_entry(
        "naflexvit",
        32,
        arch="naflexvit_base_patch16_gap",
        options={"depth": 3, "embed_dim": 96, "num_heads": 3},
        Block=2,
    ),
    timm_entry("beit", 32, arch="beit_base_patch16_224", options=_SMALL, Block=2),
    timm_entry("eva02", 28, arch="eva02_tiny_patch14_224", options={"img_size": 28, "depth": 3}, EvaBlock=2),
    timm_entry("dinov3", 32, arch="vit_base_patch16_dinov3", options=_SMALL, EvaBlock=2),
    timm_entry(
        "cait",
        32,
        arch="cait_xxs24_224",
        options={"img_size": 32, "depth": 3},
        LayerScaleBlock=2,
        LayerScaleBlockClassAttn=2,
    ),
    timm_entry(
        "swin_pico",
        32,
        arch="swin_tiny_patch4_window7_224",
        options={"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
        SwinTransformerBlock=2,
    ),
    timm_entry(
        "swin_tiny",
        56,
        arch="swin_tiny_patch4_window7_224",
        options={"img_size": 56, **_STAGES},
        SwinTransformerBlock=2,
    ),
    timm_entry(
        "swinv2_tiny",
        64,
        arch="swinv2_tiny_window8_256",
        options={"img_size": 64, "window_size": 4, **_STAGES},
        SwinTransformerV2Block=2,
    ),
    timm_entry("pvt_v2_b0", 64, Block=2),
    timm_entry(
        "twins_svt_small",
        64,
        options={"img_size": 64, "depths": (2, 2, 2, 2)},
        Block=2,
        PosConv=1,
        note="PosConv is a convolution branch",
    ),
    timm_entry(
        "xcit_nano_12",
        64,
        arch="xcit_nano_12_p16_224",
        options={"img_size": 64, "depth": 3},
        XCABlock=3,
        ClassAttentionBlock=2,
    ),
    timm_entry("levit_128s", 64, options={"img_size": 64}, LevitBlock=2, LevitDownsample=1),
    timm_entry("mobilevit_xxs", 64, options={"img_size": 64}, BottleneckBlock="shortcut", Block=2),
    timm_entry("mobilevitv2_050", 64, options={"img_size": 64}, BottleneckBlock="shortcut", LinearTransformerBlock=2),
    timm_entry(
        "coatnet_nano_rw", 64, arch="coatnet_nano_rw_224", options={"img_size": 64}, MbConvBlock=1, TransformerBlock2d=2
    ),
    timm_entry(
        "maxvit_rmlp_pico_rw",
        64,
        arch="maxvit_rmlp_pico_rw_256",
        options={"img_size": 64},
        MbConvBlock=1,
        PartitionAttentionCl=2,
    ),
    timm_entry("hiera_tiny", 64, arch="hiera_tiny_224", options={"img_size": 64, "embed_dim": 24}, HieraBlock=2),
    timm_entry(
        "davit_tiny", 64, SpatialBlock=2, ChannelBlock=2, ConvPosEnc=1, note="ConvPosEnc is a convolution branch"
    ),
    timm_entry("focalnet_tiny_srf", 64, FocalNetBlock=2),
    timm_entry("poolformer_s12", 64, MetaFormerBlock=1, note="branches that only pool have no FLOPs and do not count"),
    timm_entry("caformer_s18", 64, MetaFormerBlock=2),
    class_entry(
        "mixer",
        32,
        "mlp_mixer",
        "MlpMixer",
        options={"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32},
        MixerBlock=2,
    ),
    class_entry(
        "resmlp",
        32,
        "mlp_mixer",
        "MlpMixer",
        options={
            "img_size": 32,
            "patch_size": 8,
            "num_blocks": 2,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "block_layer": "@ResBlock",
            "norm_layer": "@Affine",
        },
        ResBlock=2,
    ),
    class_entry(
        "gmlp",
        32,
        "mlp_mixer",
        "MlpMixer",
        options={
            "img_size": 32,
            "patch_size": 8,
            "num_blocks": 3,
            "embed_dim": 32,
            "mlp_ratio": 6,
            "block_layer": "@SpatialGatingBlock",
            "mlp_layer": "@GatedMlp",
        },
        SpatialGatingBlock=1,
    ),
    class_entry(
        "volo",
        64,
        "volo",
        "VOLO",
        options={"img_size": 64, "layers": (2, 1, 2, 1), "embed_dims": (48, 96, 96, 96), "num_heads": (2, 4, 4, 4)},
        Outlooker=2,
        Transformer=2,
        ClassBlock=2,
    ),
    class_entry("convmixer", 64, "convmixer", "ConvMixer", options={"dim": 48, "depth": 4}, Residual=1),
    timm_entry("tiny_vit_5m", 64, arch="tiny_vit_5m_224", MBConv=1, TinyVitBlock=2),
    timm_entry("efficientformer_l1", 224, MetaBlock1d=2, MetaBlock2d=1, note="branches that only pool do not count"),
    timm_entry(
        "efficientformerv2_s0",
        64,
        options={"img_size": 64},
        EfficientFormerV2Block=("token_mixer", 1),
        Downsample="attn",
        note="sums inside attention do not count",
    ),
    timm_entry("efficientvit_b0", 64, ResidualBlock="shortcut"),
    timm_entry("cpubone_nano", 64, ResidualBlock="shortcut"),
    timm_entry("crossvit_tiny", 240, arch="crossvit_tiny_240", Block=2, CrossAttentionBlock=1),
    timm_entry("edgenext_xx_small", 64, ConvBlock=1, SplitTransposeBlock=1, note="an attention sits inside the branch"),
    timm_entry("sequencer2d_s", 56, options={"img_size": 56, "layers": (1, 1, 2, 1)}, Sequencer2dBlock=2),
    timm_entry("mvitv2_tiny", 64, options={"img_size": 64}, MultiScaleBlock=2),
    timm_entry("nest_tiny", 64, options={"img_size": 64}, TransformerLayer=2),
    timm_entry("pit_ti", 64, arch="pit_ti_224", options={"img_size": 64}, Block=2),
)
