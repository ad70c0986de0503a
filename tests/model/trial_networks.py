"""Networks as people write them, small: each with what it takes, regexes of its head, and its number of stages, if one is right."""

# The lines are as their authors write them.
# ruff: noqa: ANN001, ANN201, ANN204, ARG002, B905, C408, E701, E702, E731, E741, I001, N805, N812, PLC0415, Q000, RUF005, RUF007, W291
# fmt: off

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class Case(NamedTuple):
    """A network, its input, what is its head, and the number of its blocks."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    head: tuple[str, ...]
    blocks: int | None


CASES: dict[str, Case] = {}


def case(name, make, inputs, head=(), n=None):
    CASES[name] = Case(make, inputs, tuple(head), n)


def cbr(i,o,k=3,s=1,d=nn.Conv2d): 
    bn={nn.Conv2d:nn.BatchNorm2d,nn.Conv1d:nn.BatchNorm1d,nn.Conv3d:nn.BatchNorm3d}[d]
    return nn.Sequential(d(i,o,k,s,k//2,bias=False),bn(o),nn.ReLU(inplace=True))
IMG=lambda s=64,c=3,b=2: (lambda: torch.randn(b,c,s,s))

# 1 U-Net with inc, down, up, outc
class DoubleConv(nn.Module):
    def __init__(s,i,o):
        super().__init__(); s.double_conv=nn.Sequential(nn.Conv2d(i,o,3,padding=1,bias=False),nn.BatchNorm2d(o),nn.ReLU(True),nn.Conv2d(o,o,3,padding=1,bias=False),nn.BatchNorm2d(o),nn.ReLU(True))
    def forward(s,x): return s.double_conv(x)
class Down(nn.Module):
    def __init__(s,i,o): super().__init__(); s.maxpool_conv=nn.Sequential(nn.MaxPool2d(2),DoubleConv(i,o))
    def forward(s,x): return s.maxpool_conv(x)
class Up(nn.Module):
    def __init__(s,i,o,bilinear):
        super().__init__()
        if bilinear: s.up=nn.Upsample(scale_factor=2,mode='bilinear',align_corners=True); s.conv=DoubleConv(i,o)
        else: s.up=nn.ConvTranspose2d(i,i//2,2,2); s.conv=DoubleConv(i,o)
    def forward(s,a,b): return s.conv(torch.cat([b,s.up(a)],1))
class OutConv(nn.Module):
    def __init__(s,i,o): super().__init__(); s.conv=nn.Conv2d(i,o,1)
    def forward(s,x): return s.conv(x)
class MUNet(nn.Module):
    def __init__(s,ch=3,nc=2,bilinear=False,w=8):
        super().__init__(); f=2 if bilinear else 1
        s.inc=DoubleConv(ch,w); s.down1=Down(w,2*w); s.down2=Down(2*w,4*w); s.down3=Down(4*w,8*w); s.down4=Down(8*w,16*w//f)
        s.up1=Up(16*w,8*w//f,bilinear); s.up2=Up(8*w,4*w//f,bilinear); s.up3=Up(4*w,2*w//f,bilinear); s.up4=Up(2*w,w,bilinear); s.outc=OutConv(w,nc)
    def forward(s,x):
        x1=s.inc(x);x2=s.down1(x1);x3=s.down2(x2);x4=s.down3(x3);x5=s.down4(x4)
        x=s.up1(x5,x4);x=s.up2(x,x3);x=s.up3(x,x2);x=s.up4(x,x1);return s.outc(x)
case("unet-inc-down-up", MUNet, IMG(), [r"^up",r"^outc"], 4)
case("unet-inc-down-up-bilinear", lambda: MUNet(bilinear=True), IMG(), [r"^up",r"^outc"], 4)
# 2 U-Net with Conv and Up_conv
class LJUNet(nn.Module):
    def __init__(s,w=8):
        super().__init__(); c=[w,2*w,4*w,8*w,16*w]
        s.Maxpool=nn.MaxPool2d(2)
        for i,(a,b) in enumerate(zip([3]+c[:-1],c),1): setattr(s,f"Conv{i}",DoubleConv(a,b))
        for i in (5,4,3,2):
            setattr(s,f"Up{i}",nn.Sequential(nn.Upsample(scale_factor=2),cbr(c[i-1],c[i-2]))); setattr(s,f"Up_conv{i}",DoubleConv(c[i-1],c[i-2]))
        s.Conv_1x1=nn.Conv2d(w,1,1)
    def forward(s,x):
        e=[]
        for i in range(1,6):
            x=getattr(s,f"Conv{i}")(x if i==1 else s.Maxpool(x)); e.append(x)
        for i in (5,4,3,2):
            x=getattr(s,f"Up_conv{i}")(torch.cat([e[i-2],getattr(s,f"Up{i}")(x)],1))
        return s.Conv_1x1(x)
case("unet-Conv-Up_conv", LJUNet, IMG(), [r"^Up",r"^Conv_1x1"])
# 3 enc/dec module lists
class ListUNet(nn.Module):
    def __init__(s,w=8,names=("encoder_blocks","decoder_blocks")):
        super().__init__(); c=[3,w,2*w,4*w,8*w]
        s.e=nn.ModuleList(DoubleConv(a,b) for a,b in zip(c,c[1:])); s.d=nn.ModuleList(DoubleConv(b+a,a) for a,b in [(4*w,8*w),(2*w,4*w),(w,2*w)])
        for n,k in zip(names,("e","d")): m=getattr(s,k); delattr(s,k); setattr(s,n,m)
        s.names=names; s.final=nn.Conv2d(w,1,1); s.pool=nn.MaxPool2d(2)
    def forward(s,x):
        e=[]
        for i,m in enumerate(getattr(s,s.names[0])): x=m(x if i==0 else s.pool(x)); e.append(x)
        for m,sk in zip(getattr(s,s.names[1]),e[-2::-1]): x=m(torch.cat([F.interpolate(x,scale_factor=2),sk],1))
        return s.final(x)
case("list-unet-encoder_blocks", ListUNet, IMG(), [r"^decoder",r"^final"],4)
case("list-unet-downs-ups", lambda: ListUNet(names=("downs","ups")), IMG(), [r"^ups",r"^final"],4)
# 4 nnU-Net-like
class Enc(nn.Module):
    def __init__(s,c,d=nn.Conv2d):
        super().__init__(); s.stages=nn.ModuleList(nn.Sequential(cbr(a,b,3,1 if i==0 else 2,d),cbr(b,b,3,1,d)) for i,(a,b) in enumerate(zip(c,c[1:])))
    def forward(s,x):
        o=[]
        for m in s.stages: x=m(x); o.append(x)
        return o
class Dec(nn.Module):
    def __init__(s,enc,c,nc,d=nn.Conv2d):
        super().__init__(); s.encoder=enc  # as in dynamic_network_architectures
        T=nn.ConvTranspose2d if d is nn.Conv2d else nn.ConvTranspose3d
        r=c[1:][::-1]
        s.transpconvs=nn.ModuleList(T(a,b,2,2) for a,b in zip(r,r[1:])); s.stages=nn.ModuleList(nn.Sequential(cbr(2*b,b,3,1,d),cbr(b,b,3,1,d)) for b in r[1:]); s.seg_layers=nn.ModuleList(d(b,nc,1) for b in r[1:])
    def forward(s,sk):
        x=sk[-1]; o=[]
        for i in range(len(s.stages)): x=s.stages[i](torch.cat([s.transpconvs[i](x),sk[-i-2]],1)); o.append(s.seg_layers[i](x))
        return o[::-1]
class NN(nn.Module):
    def __init__(s,d=nn.Conv2d,ch=3):
        super().__init__(); c=[ch,8,16,32,32]; s.encoder=Enc(c,d); s.decoder=Dec(s.encoder,c,3,d)
    def forward(s,x): return s.decoder(s.encoder(x))
case("nnunet-2d", NN, IMG(), [r"^decoder\.(transp|stages|seg)"],4)
case("nnunet-3d", lambda: NN(nn.Conv3d,1), lambda: torch.randn(1,1,16,16,16), [r"^decoder\.(transp|stages|seg)"],4)
# 5 YOLO-like
class CSP(nn.Module):
    def __init__(s,i,o): super().__init__(); s.cv1=cbr(i,o//2,1); s.cv2=cbr(i,o//2,1); s.m=nn.Sequential(cbr(o//2,o//2)); s.cv3=cbr(o,o,1)
    def forward(s,x): return s.cv3(torch.cat([s.m(s.cv1(x)),s.cv2(x)],1))
class Cat(nn.Module):
    def forward(s,x): return torch.cat(x,1)
class Detect(nn.Module):
    def __init__(s,ch): super().__init__(); s.cv=nn.ModuleList(nn.Sequential(cbr(c,c),nn.Conv2d(c,18,1)) for c in ch)
    def forward(s,xs): return [m(x) for m,x in zip(s.cv,xs)]
class YOLO(nn.Module):
    def __init__(s,w=8):
        super().__init__()
        L=[(-1,cbr(3,w,3,2)),(-1,cbr(w,2*w,3,2)),(-1,CSP(2*w,2*w)),(-1,cbr(2*w,4*w,3,2)),(-1,CSP(4*w,4*w)),(-1,cbr(4*w,8*w,3,2)),(-1,CSP(8*w,8*w)),
           (-1,nn.Upsample(scale_factor=2)),([-1,4],Cat()),(-1,CSP(12*w,4*w)),(-1,cbr(4*w,4*w,3,2)),([-1,6],Cat()),(-1,CSP(12*w,8*w)),([9,12],Detect([4*w,8*w]))]
        s.model=nn.Sequential(*[m for _,m in L]); s.f=[f for f,_ in L]
    def forward(s,x):
        y=[]
        for f,m in zip(s.f,s.model):
            if f!=-1: x=[x if j==-1 else y[j] for j in f]
            x=m(x); y.append(x)
        return x
case("yolo-like", YOLO, IMG(), [r"^model\.(9|1\d)\."])
# 6 MONAI-like nested
class Skip(nn.Module):
    def __init__(s,m): super().__init__(); s.submodule=m
    def forward(s,x): return torch.cat([x,s.submodule(x)],1)
def monai(i,o,cs):
    c=cs[0]
    if len(cs)>2: sub=monai(c,c,cs[1:]); up=2*c
    else: sub=cbr(c,cs[1]); up=c+cs[1]
    return nn.Sequential(cbr(i,c,3,2),Skip(sub),nn.Sequential(nn.ConvTranspose2d(up,o,3,2,1,1),nn.BatchNorm2d(o),nn.PReLU()))
class MONAI(nn.Module):
    def __init__(s): super().__init__(); s.model=monai(3,2,[8,16,32,64])
    def forward(s,x): return s.model(x)
case("monai-nested-unet", MONAI, IMG(), [])
# resnet helper
R18=lambda: torchvision.models.resnet18(weights=None)
class CNNLSTM(nn.Module):
    def __init__(s):
        super().__init__(); r=R18(); s.cnn=nn.Sequential(*list(r.children())[:-1]); s.lstm=nn.LSTM(512,32,2,batch_first=True); s.fc=nn.Linear(32,5)
    def forward(s,x):
        b,t=x.shape[:2]; f=s.cnn(x.flatten(0,1)).flatten(1).view(b,t,-1); return s.fc(s.lstm(f)[0][:,-1])
case("resnet-lstm", CNNLSTM, lambda: torch.randn(2,4,3,64,64), [r"^fc"])
class ResLSTM2(nn.Module):
    def __init__(s):
        super().__init__(); s.resnet=R18(); s.resnet.fc=nn.Linear(512,64); s.lstm=nn.LSTM(64,32,2,batch_first=True); s.fc1=nn.Linear(32,16); s.fc2=nn.Linear(16,5)
    def forward(s,x):
        b,t=x.shape[:2]; f=s.resnet(x.flatten(0,1)).view(b,t,-1); return s.fc2(F.relu(s.fc1(s.lstm(f)[0][:,-1])))
case("resnet-lstm-2fc", ResLSTM2, lambda: torch.randn(2,4,3,64,64), [r"^fc"])
class TwoTower(nn.Module):
    def __init__(s):
        super().__init__(); s.image_encoder=R18(); s.image_encoder.fc=nn.Identity(); s.text_embed=nn.Embedding(50,32)
        s.text_encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(32,4,64,batch_first=True),4,enable_nested_tensor=False); s.image_proj=nn.Linear(512,16); s.text_proj=nn.Linear(32,16); s.logit_scale=nn.Parameter(torch.tensor(1.))
    def forward(s,image,text):
        i=s.image_proj(s.image_encoder(image)); t=s.text_proj(s.text_encoder(s.text_embed(text)).mean(1)); return s.logit_scale.exp()*i@t.T
case("two-tower", TwoTower, lambda: (torch.randn(2,3,64,64),torch.zeros(2,6,dtype=torch.long)), [r"_proj",r"logit_scale"])
class Siamese(nn.Module):
    def __init__(s): super().__init__(); s.backbone=R18(); s.backbone.fc=nn.Identity(); s.head=nn.Sequential(nn.Linear(512,64),nn.ReLU(),nn.Linear(64,1))
    def forward(s,a,b): return s.head((s.backbone(a)-s.backbone(b)).abs())
case("siamese", Siamese, lambda: (torch.randn(2,3,64,64),torch.randn(2,3,64,64)), [r"^head"],4)
class Siamese2(nn.Module):
    def __init__(s):
        super().__init__(); s.resnet=R18(); n=s.resnet.fc.in_features; s.resnet=nn.Sequential(*list(s.resnet.children())[:-1]); s.fc=nn.Sequential(nn.Linear(2*n,256),nn.ReLU(),nn.Linear(256,1)); s.sigmoid=nn.Sigmoid()
    def once(s,x): return s.resnet(x).flatten(1)
    def forward(s,a,b): return s.sigmoid(s.fc(torch.cat([s.once(a),s.once(b)],1)))
case("siamese-pytorch-example", Siamese2, lambda: (torch.randn(2,3,64,64),torch.randn(2,3,64,64)), [r"^fc"],4)
class MultiTask(nn.Module):
    def __init__(s,nm="features"):
        super().__init__(); r=R18(); s.features=nn.Sequential(*list(r.children())[:-1]); s.age=nn.Linear(512,1); s.gender=nn.Linear(512,2)
    def forward(s,x): f=s.features(x).flatten(1); return s.age(f),s.gender(f)
case("multitask-two-linear-heads", MultiTask, IMG(), [r"^age",r"^gender"],4)
class MultiTask2(nn.Module):
    def __init__(s):
        super().__init__(); s.backbone=R18(); s.backbone.fc=nn.Identity(); s.age=nn.Sequential(nn.Linear(512,64),nn.ReLU(),nn.Linear(64,1)); s.gender=nn.Sequential(nn.Linear(512,64),nn.ReLU(),nn.Linear(64,2))
    def forward(s,x): f=s.backbone(x); return {"age":s.age(f),"gender":s.gender(f)}
case("multitask-backbone", MultiTask2, IMG(), [r"^age",r"^gender"],4)
class MultiTask3(MultiTask2):
    def __init__(s): super().__init__(); s.resnet=s.backbone; del s.backbone
    def forward(s,x): f=s.resnet(x); return {"age":s.age(f),"gender":s.gender(f)}
case("multitask-resnet-named", MultiTask3, IMG(), [r"^age",r"^gender"],4)
# usual fine-tuning wrappers
class Wrap1(nn.Module):
    def __init__(s): super().__init__(); s.model=R18(); s.model.fc=nn.Linear(512,5)
    def forward(s,x): return s.model(x)
case("wrapped-resnet-fc", Wrap1, IMG(), [r"fc"],4)
class Wrap2(nn.Module):
    def __init__(s): super().__init__(); s.model=R18(); s.model.fc=nn.Sequential(nn.Dropout(0.),nn.Linear(512,64),nn.ReLU(),nn.Linear(64,5))
    def forward(s,x): return s.model(x)
case("wrapped-resnet-mlp-fc", Wrap2, IMG(), [r"fc"],4)
class Wrap3(nn.Module):
    def __init__(s): super().__init__(); s.base=nn.Sequential(*list(R18().children())[:-2]); s.pool=nn.AdaptiveAvgPool2d(1); s.bn=nn.BatchNorm1d(512); s.classifier=nn.Linear(512,5)
    def forward(s,x): return s.classifier(s.bn(s.pool(s.base(x)).flatten(1)))
case("reid-base-bnneck", Wrap3, IMG(), [r"^classifier"],4)
class Wrap4(nn.Module):
    def __init__(s):
        super().__init__(); s.feature_extractor=R18(); s.feature_extractor.fc=nn.Identity(); s.dropout=nn.Dropout(0.); s.fc1=nn.Linear(512,64); s.fc2=nn.Linear(64,5)
    def forward(s,x): return s.fc2(F.relu(s.fc1(s.dropout(s.feature_extractor(x)))))
case("feature_extractor-fc1-fc2", Wrap4, IMG(), [r"^fc"],4)
class TimmReg(nn.Module):
    def __init__(s):
        super().__init__(); import timm; s.encoder=timm.create_model("resnet18",num_classes=0); s.mu=nn.Linear(512,4); s.logvar=nn.Linear(512,4); s.decoder=nn.Sequential(nn.Linear(4,64),nn.ReLU(),nn.Linear(64,10))
    def forward(s,x): f=s.encoder(x); m,l=s.mu(f),s.logvar(f); return s.decoder(m+0*l),m,l
case("vae-timm-encoder", TimmReg, IMG(), [r"^mu",r"^logvar",r"^decoder"],4)
# GAN
DC=lambda: nn.Sequential(*[l for i,(a,b) in enumerate([(100,64),(64,32),(32,16),(16,8)]) for l in (nn.ConvTranspose2d(a,b,4,1 if i==0 else 2,0 if i==0 else 1,bias=False),nn.BatchNorm2d(b),nn.ReLU(True))],nn.ConvTranspose2d(8,3,4,2,1,bias=False),nn.Tanh())
class DCG(nn.Module):
    def __init__(s): super().__init__(); s.main=DC()
    def forward(s,z): return s.main(z)
case("dcgan-generator", DCG, lambda: torch.randn(2,100,1,1), [])
class DCD(nn.Module):
    def __init__(s): super().__init__(); s.main=nn.Sequential(nn.Conv2d(3,8,4,2,1,bias=False),nn.LeakyReLU(.2,True),nn.Conv2d(8,16,4,2,1,bias=False),nn.BatchNorm2d(16),nn.LeakyReLU(.2,True),nn.Conv2d(16,32,4,2,1,bias=False),nn.BatchNorm2d(32),nn.LeakyReLU(.2,True),nn.Conv2d(32,64,4,2,1,bias=False),nn.BatchNorm2d(64),nn.LeakyReLU(.2,True),nn.Conv2d(64,1,4,1,0,bias=False),nn.Sigmoid())
    def forward(s,x): return s.main(x)
case("dcgan-discriminator", DCD, IMG(), [r"main\.11"])
class ResBlk(nn.Module):
    def __init__(s,c): super().__init__(); s.conv_block=nn.Sequential(nn.ReflectionPad2d(1),nn.Conv2d(c,c,3),nn.InstanceNorm2d(c),nn.ReLU(True),nn.ReflectionPad2d(1),nn.Conv2d(c,c,3),nn.InstanceNorm2d(c))
    def forward(s,x): return x+s.conv_block(x)
class CycG(nn.Module):
    def __init__(s,w=8): super().__init__(); s.model=nn.Sequential(nn.ReflectionPad2d(3),nn.Conv2d(3,w,7),nn.InstanceNorm2d(w),nn.ReLU(True),nn.Conv2d(w,2*w,3,2,1),nn.InstanceNorm2d(2*w),nn.ReLU(True),nn.Conv2d(2*w,4*w,3,2,1),nn.InstanceNorm2d(4*w),nn.ReLU(True),*[ResBlk(4*w) for _ in range(6)],nn.ConvTranspose2d(4*w,2*w,3,2,1,1),nn.InstanceNorm2d(2*w),nn.ReLU(True),nn.ConvTranspose2d(2*w,w,3,2,1,1),nn.InstanceNorm2d(w),nn.ReLU(True),nn.ReflectionPad2d(3),nn.Conv2d(w,3,7),nn.Tanh())
    def forward(s,x): return s.model(x)
case("cyclegan-resnet-generator", CycG, IMG(), [r"model\.(16|19|23)\."])
# audio M5
class M5(nn.Module):
    def __init__(s):
        super().__init__(); s.conv1=nn.Conv1d(1,32,80,16); s.bn1=nn.BatchNorm1d(32); s.pool1=nn.MaxPool1d(4); s.conv2=nn.Conv1d(32,32,3); s.bn2=nn.BatchNorm1d(32); s.pool2=nn.MaxPool1d(4); s.conv3=nn.Conv1d(32,64,3); s.bn3=nn.BatchNorm1d(64); s.pool3=nn.MaxPool1d(4); s.conv4=nn.Conv1d(64,64,3); s.bn4=nn.BatchNorm1d(64); s.fc1=nn.Linear(64,35)
    def forward(s,x):
        x=s.pool1(F.relu(s.bn1(s.conv1(x)))); x=s.pool2(F.relu(s.bn2(s.conv2(x)))); x=s.pool3(F.relu(s.bn3(s.conv3(x)))); x=F.relu(s.bn4(s.conv4(x))); return F.log_softmax(s.fc1(x.mean(-1)),-1)
case("m5-audio-cnn", M5, lambda: torch.randn(2,1,16000), [r"^fc1"],4)
class Net1d(nn.Module):
    def __init__(s): super().__init__(); s.layer1=cbr(12,16,7,2,nn.Conv1d); s.layer2=cbr(16,32,5,2,nn.Conv1d); s.layer3=cbr(32,64,3,2,nn.Conv1d); s.fc=nn.Linear(64,5)
    def forward(s,x): return s.fc(s.layer3(s.layer2(s.layer1(x))).mean(-1))
case("ecg-1d-cnn", Net1d, lambda: torch.randn(2,12,500), [r"^fc"],3)
class MLP(nn.Module):
    def __init__(s): super().__init__(); s.fc1=nn.Linear(784,64); s.fc2=nn.Linear(64,64); s.fc3=nn.Linear(64,64); s.fc4=nn.Linear(64,10)
    def forward(s,x): x=x.view(-1,784); return s.fc4(F.relu(s.fc3(F.relu(s.fc2(F.relu(s.fc1(x)))))))
case("mlp-fc1-4", MLP, lambda: torch.randn(2,784), [r"^fc4"],3)
class GCNConv(nn.Module):
    def __init__(s,i,o): super().__init__(); s.lin=nn.Linear(i,o,bias=False); s.bias=nn.Parameter(torch.zeros(o))
    def forward(s,x,ei): x=s.lin(x); out=torch.zeros_like(x).index_add(0,ei[1],x[ei[0]]); return out+s.bias
class GNN(nn.Module):
    def __init__(s): super().__init__(); s.convs=nn.ModuleList([GCNConv(16,32),GCNConv(32,32),GCNConv(32,32)]); s.lin=nn.Linear(32,7)
    def forward(s,x,edge_index):
        for c in s.convs: x=F.relu(c(x,edge_index))
        return F.log_softmax(s.lin(x),-1)
case("gcn", GNN, lambda: (torch.randn(10,16),torch.randint(0,10,(2,30))), [r"^lin\."],3)
class GNN2(nn.Module):
    def __init__(s): super().__init__(); s.conv1=GCNConv(16,32); s.conv2=GCNConv(32,7)
    def forward(s,x,edge_index): return s.conv2(F.relu(s.conv1(x,edge_index)),edge_index)
case("gcn-cora-2", GNN2, lambda: (torch.randn(10,16),torch.randint(0,10,(2,30))), [])
class DictIn(nn.Module):
    def __init__(s): super().__init__(); s.backbone=R18(); s.backbone.fc=nn.Identity(); s.meta=nn.Linear(4,16); s.head=nn.Linear(528,3)
    def forward(s,batch): return {"logits": s.head(torch.cat([s.backbone(batch["image"]),s.meta(batch["meta"])],1))}
case("dict-batch", DictIn, lambda: ({"image":torch.randn(2,3,64,64),"meta":torch.randn(2,4)},), [r"^head",r"^meta"],4)
class ListIn(nn.Module):
    def __init__(s): super().__init__(); s.backbone=R18(); s.backbone.fc=nn.Identity(); s.head=nn.Linear(512,3)
    def forward(s,images): return [s.head(s.backbone(i[None])) for i in images]
case("list-of-images", ListIn, lambda: ([torch.randn(3,64,64),torch.randn(3,48,64)],), [r"^head"],4)
# DINO hub ViT
class Blk(nn.Module):
    def __init__(s,d=32):
        super().__init__(); s.norm1=nn.LayerNorm(d); s.attn=nn.MultiheadAttention(d,4,batch_first=True); s.norm2=nn.LayerNorm(d); s.mlp=nn.Sequential(nn.Linear(d,64),nn.GELU(),nn.Linear(64,d))
    def forward(s,x): y=s.norm1(x); x=x+s.attn(y,y,y,need_weights=False)[0]; return x+s.mlp(s.norm2(x))
class ViT(nn.Module):
    def __init__(s,depth=5,d=32,nc=0):
        super().__init__(); s.cls_token=nn.Parameter(torch.zeros(1,1,d)); s.pos_embed=nn.Parameter(torch.zeros(1,17,d)); s.patch_embed=nn.Conv2d(3,d,16,16); s.blocks=nn.ModuleList(Blk(d) for _ in range(depth)); s.norm=nn.LayerNorm(d); s.head=nn.Linear(d,nc) if nc else nn.Identity()
    def forward(s,x):
        x=s.patch_embed(x).flatten(2).transpose(1,2); x=torch.cat([s.cls_token.expand(len(x),-1,-1),x],1)+s.pos_embed
        for b in s.blocks: x=b(x)
        return s.head(s.norm(x)[:,0])
case("dino-hub-vit", ViT, IMG(), [],5)
class DinoHead(nn.Module):
    def __init__(s): super().__init__(); s.backbone=ViT(); s.head=nn.Module(); s.head.mlp=nn.Sequential(nn.Linear(32,64),nn.GELU(),nn.Linear(64,16)); s.head.last_layer=nn.utils.weight_norm(nn.Linear(16,20,bias=False))
    def forward(s,x):
        x=list(x); return s.head.last_layer(s.head.mlp(torch.cat([s.backbone(i) for i in x])))
case("dino-multicrop-list", DinoHead, lambda: ([torch.randn(2,3,64,64),torch.randn(2,3,64,64)],), [r"^head"],5)
class DinoLin(nn.Module):
    def __init__(s): super().__init__(); s.dino=ViT(); s.linear=nn.Linear(32,4)
    def forward(s,x): return s.linear(s.dino(x))
case("dino-linear-probe", DinoLin, IMG(), [r"^linear"],5)
class DinoSeg(nn.Module):
    def __init__(s): super().__init__(); s.dino=ViT(); s.up=nn.Sequential(cbr(32,16),cbr(16,16),nn.Conv2d(16,4,1))
    def forward(s,x):
        d=s.dino; t=d.patch_embed(x).flatten(2).transpose(1,2)
        for b in d.blocks: t=b(t)
        return s.up(d.norm(t).transpose(1,2).unflatten(2,(4,4)))
case("dino-conv-decoder", DinoSeg, IMG(), [r"^up"],5)
# plain ViT
class LVit(nn.Module):
    def __init__(s,d=32):
        super().__init__(); s.to_patch_embedding=nn.Sequential(nn.Flatten(2),nn.LayerNorm(64),nn.Linear(64,d)); s.pos_embedding=nn.Parameter(torch.zeros(1,3,d)); s.transformer=nn.Module(); s.transformer.layers=nn.ModuleList(nn.ModuleList([nn.Sequential(nn.LayerNorm(d),nn.Linear(d,d)),nn.Sequential(nn.LayerNorm(d),nn.Linear(d,64),nn.GELU(),nn.Linear(64,d))]) for _ in range(4)); s.mlp_head=nn.Linear(d,10)
    def forward(s,x):
        x=s.to_patch_embedding(x)+s.pos_embedding
        for a,f in s.transformer.layers: x=a(x)+x; x=f(x)+x
        return s.mlp_head(x.mean(1))
case("vit-plain", LVit, lambda: torch.randn(2,3,8,8), [r"^mlp_head"],4)
# mmseg
class MMSeg(nn.Module):
    def __init__(s,aux=True):
        super().__init__(); s.backbone=torchvision.models._utils.IntermediateLayerGetter(R18(),{"layer1":"0","layer2":"1","layer3":"2","layer4":"3"}); s.neck=nn.ModuleList(nn.Conv2d(c,16,1) for c in (64,128,256,512)); s.decode_head=nn.Sequential(cbr(64,16),nn.Conv2d(16,4,1)); s.auxiliary_head=nn.Sequential(cbr(16,8),nn.Conv2d(8,4,1))
    def forward(s,x):
        f=[n(v) for n,v in zip(s.neck,s.backbone(x).values())]; o=s.decode_head(torch.cat([F.interpolate(v,size=f[0].shape[-2:]) for v in f],1))
        return (o,s.auxiliary_head(f[2])) if s.training else o
case("mmseg-encoder-decoder", MMSeg, IMG(), [r"^neck",r"_head"],4)
class MMDataPre(MMSeg):
    def forward(s,inputs,data_samples=None,mode="tensor"):
        if mode=="tensor": return super().forward(inputs)
        raise RuntimeError
case("mmseg-mode-tensor", MMDataPre, IMG(), [r"^neck",r"_head"],4)
# HRNet keypoint style
class HRM(nn.Module):
    def __init__(s,n,c): super().__init__(); s.branches=nn.ModuleList(nn.Sequential(cbr(c*2**i,c*2**i),cbr(c*2**i,c*2**i)) for i in range(n)); s.fuse_layers=nn.ModuleList(nn.ModuleList(nn.Conv2d(c*2**j,c*2**i,1) for j in range(n)) for i in range(n))
    def forward(s,xs):
        xs=[b(x) for b,x in zip(s.branches,xs)]
        return [sum(F.interpolate(s.fuse_layers[i][j](xs[j]),size=xs[i].shape[-2:]) for j in range(len(xs))) for i in range(len(xs))]
class HR(nn.Module):
    def __init__(s,c=8):
        super().__init__(); s.conv1=nn.Conv2d(3,16,3,2,1); s.bn1=nn.BatchNorm2d(16); s.conv2=nn.Conv2d(16,16,3,2,1); s.bn2=nn.BatchNorm2d(16); s.layer1=nn.Sequential(cbr(16,16),cbr(16,16))
        s.transition1=nn.ModuleList([cbr(16,c),cbr(16,2*c,3,2)]); s.stage2=nn.Sequential(HRM(2,c)); s.transition2=nn.ModuleList([nn.Identity(),nn.Identity(),cbr(2*c,4*c,3,2)]); s.stage3=nn.Sequential(HRM(3,c),HRM(3,c)); s.transition3=nn.ModuleList([nn.Identity()]*3+[cbr(4*c,8*c,3,2)]); s.stage4=nn.Sequential(HRM(4,c)); s.final_layer=nn.Conv2d(c,17,1)
    def forward(s,x):
        x=F.relu(s.bn1(s.conv1(x))); x=F.relu(s.bn2(s.conv2(x))); x=s.layer1(x); xs=s.stage2([t(x) for t in s.transition1]); xs=s.stage3(xs+[s.transition2[2](xs[-1])]); xs=s.stage4(xs+[s.transition3[3](xs[-1])]); return s.final_layer(xs[0])
case("hrnet-keypoint", HR, IMG(), [r"^final_layer"])
# nanoGPT
class NanoGPT(nn.Module):
    def __init__(s,d=32):
        super().__init__(); s.transformer=nn.ModuleDict(dict(wte=nn.Embedding(65,d),wpe=nn.Embedding(16,d),drop=nn.Dropout(0.),h=nn.ModuleList(Blk(d) for _ in range(4)),ln_f=nn.LayerNorm(d))); s.lm_head=nn.Linear(d,65,bias=False); s.transformer.wte.weight=s.lm_head.weight
    def forward(s,idx,targets=None):
        x=s.transformer.wte(idx)+s.transformer.wpe(torch.arange(idx.shape[1],device=idx.device))
        for b in s.transformer.h: x=b(x)
        return s.lm_head(s.transformer.ln_f(x)),None
case("nanogpt-tied", NanoGPT, lambda: torch.zeros(2,8,dtype=torch.long), [],4)
# whisper-openai-like
class WE(nn.Module):
    def __init__(s,d=32): super().__init__(); s.conv1=nn.Conv1d(80,d,3,padding=1); s.conv2=nn.Conv1d(d,d,3,2,1); s.register_buffer("pe",torch.zeros(50,d)); s.blocks=nn.ModuleList(Blk(d) for _ in range(3)); s.ln_post=nn.LayerNorm(d)
    def forward(s,x):
        x=F.gelu(s.conv2(F.gelu(s.conv1(x)))).transpose(1,2)+s.pe
        for b in s.blocks: x=b(x)
        return s.ln_post(x)
class WD(nn.Module):
    def __init__(s,d=32): super().__init__(); s.token_embedding=nn.Embedding(60,d); s.positional_embedding=nn.Parameter(torch.zeros(20,d)); s.blocks=nn.ModuleList(nn.TransformerDecoderLayer(d,4,64,batch_first=True) for _ in range(3)); s.ln=nn.LayerNorm(d)
    def forward(s,t,xa):
        x=s.token_embedding(t)+s.positional_embedding[:t.shape[1]]
        for b in s.blocks: x=b(x,xa)
        return s.ln(x)@s.token_embedding.weight.T
class Whis(nn.Module):
    def __init__(s): super().__init__(); s.encoder=WE(); s.decoder=WD()
    def forward(s,mel,tokens): return s.decoder(tokens,s.encoder(mel))
case("whisper-like", Whis, lambda: (torch.randn(2,80,100),torch.zeros(2,5,dtype=torch.long)), [r"^decoder"],3)
class WhisCls(nn.Module):
    def __init__(s): super().__init__(); s.encoder=WE(); s.classifier=nn.Linear(32,4)
    def forward(s,mel): return s.classifier(s.encoder(mel).mean(1))
case("whisper-encoder-classifier", WhisCls, lambda: torch.randn(2,80,100), [r"^classifier"],3)
# PointNet
class PN(nn.Module):
    def __init__(s): super().__init__(); s.conv1=nn.Conv1d(3,16,1); s.conv2=nn.Conv1d(16,32,1); s.conv3=nn.Conv1d(32,64,1); s.bn1=nn.BatchNorm1d(16); s.bn2=nn.BatchNorm1d(32); s.bn3=nn.BatchNorm1d(64); s.fc1=nn.Linear(64,32); s.fc2=nn.Linear(32,16); s.fc3=nn.Linear(16,5); s.bn4=nn.BatchNorm1d(32); s.bn5=nn.BatchNorm1d(16)
    def forward(s,x):
        x=F.relu(s.bn1(s.conv1(x)));x=F.relu(s.bn2(s.conv2(x)));x=s.bn3(s.conv3(x)).max(2)[0];x=F.relu(s.bn4(s.fc1(x)));x=F.relu(s.bn5(s.fc2(x)));return s.fc3(x)
case("pointnet", PN, lambda: torch.randn(2,3,100), [r"^fc3"])
# SAM official-like
class SAMO(nn.Module):
    def __init__(s,d=32):
        super().__init__(); e=ViT(4,d); e.neck=nn.Sequential(nn.Conv2d(d,16,1,bias=False),nn.Conv2d(16,16,3,padding=1,bias=False)); del e.norm,e.head,e.cls_token; s.image_encoder=e; s.prompt_encoder=nn.Linear(2,16); s.mask_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(16,2,32,batch_first=True),2)
    def forward(s,batched_input,multimask_output):
        x=torch.stack([b["image"] for b in batched_input]); e=s.image_encoder; t=e.patch_embed(x).flatten(2).transpose(1,2)+e.pos_embed[:,1:]
        for b in e.blocks: t=b(t)
        f=e.neck(t.transpose(1,2).unflatten(2,(4,4))).flatten(2).transpose(1,2); p=s.prompt_encoder(torch.stack([b["points"] for b in batched_input])); return [{"masks":m} for m in s.mask_decoder(p,f)@f.transpose(1,2)]
case("sam-like", SAMO, lambda: ([{"image":torch.randn(3,64,64),"points":torch.randn(2,2)}],True), [r"^prompt",r"^mask_dec"],4)
# diffusion UNet
class TBlk(nn.Module):
    def __init__(s,i,o): super().__init__(); s.c=cbr(i,o); s.t=nn.Linear(16,o)
    def forward(s,x,t): return s.c(x)+s.t(t)[:,:,None,None]
class DUNet(nn.Module):
    def __init__(s,w=8): super().__init__(); s.time_embed=nn.Sequential(nn.Linear(16,16),nn.SiLU(),nn.Linear(16,16)); s.input_blocks=nn.ModuleList([TBlk(3,w),TBlk(w,w),TBlk(w,2*w),TBlk(2*w,2*w)]); s.middle_block=TBlk(2*w,2*w); s.output_blocks=nn.ModuleList([TBlk(4*w,2*w),TBlk(4*w,w),TBlk(2*w,w),TBlk(2*w,w)]); s.out=nn.Conv2d(w,3,3,padding=1)
    def forward(s,x,timesteps):
        t=s.time_embed(torch.cos(timesteps[:,None]*torch.arange(16.)[None])); h=[]
        for b in s.input_blocks: x=b(x,t); h.append(x)
        x=s.middle_block(x,t)
        for b in s.output_blocks: x=b(torch.cat([x,h.pop()],1),t)
        return s.out(x)
case("diffusion-unet", DUNet, lambda: (torch.randn(2,3,32,32),torch.tensor([1.,5.])), [r"^output_blocks",r"^out\."])
class CRNN(nn.Module):
    def __init__(s): super().__init__(); s.cnn=nn.Sequential(); [s.cnn.add_module(f"conv{i}",nn.Conv2d(a,b,3,1,1)) or s.cnn.add_module(f"relu{i}",nn.ReLU(True)) or s.cnn.add_module(f"pool{i}",nn.MaxPool2d((2,1) if i>1 else 2)) for i,(a,b) in enumerate([(1,8),(8,16),(16,32),(32,32)])]; s.rnn=nn.Sequential(BiL(64,32,32),BiL(32,32,11))
    def forward(s,x): f=s.cnn(x); b,c,h,w=f.shape; return s.rnn(f.permute(3,0,1,2).reshape(w,b,c*h))
class BiL(nn.Module):
    def __init__(s,i,h,o): super().__init__(); s.rnn=nn.LSTM(i,h,bidirectional=True); s.embedding=nn.Linear(2*h,o)
    def forward(s,x): return s.embedding(s.rnn(x)[0])
case("crnn-ocr", CRNN, lambda: torch.randn(2,1,32,64), [])
# U2Net
class U2(nn.Module):
    def __init__(s,w=8):
        super().__init__(); s.stage1=DoubleConv(3,w)
        for i in range(2,7): setattr(s,f"stage{i}",DoubleConv(w,w))
        for i in range(5,0,-1): setattr(s,f"stage{i}d",DoubleConv(2*w,w))
        for i in range(1,7): setattr(s,f"side{i}",nn.Conv2d(w,1,3,padding=1))
        s.outconv=nn.Conv2d(6,1,1); s.pool=nn.MaxPool2d(2)
    def forward(s,x):
        e=[]
        for i in range(1,7): x=getattr(s,f"stage{i}")(x if i==1 else s.pool(x)); e.append(x)
        d=[x]
        for i in range(5,0,-1): x=getattr(s,f"stage{i}d")(torch.cat([F.interpolate(x,scale_factor=2),e[i-1]],1)); d.append(x)
        o=[F.interpolate(getattr(s,f"side{6-i}")(v),size=x.shape[-2:]) for i,v in enumerate(d)]; return [s.outconv(torch.cat(o,1))]+o
case("u2net", U2, IMG(), [r"^stage\dd",r"^side",r"^outconv"])
# TernausNet
class Tern(nn.Module):
    def __init__(s):
        super().__init__(); s.pool=nn.MaxPool2d(2); s.encoder=R18(); e=s.encoder; s.conv1=nn.Sequential(e.conv1,e.bn1,e.relu,s.pool); s.conv2,s.conv3,s.conv4,s.conv5=e.layer1,e.layer2,e.layer3,e.layer4; s.center=cbr(512,32); s.dec5=cbr(544,32); s.dec4=cbr(288,32); s.dec3=cbr(160,32); s.dec2=cbr(96,32); s.final=nn.Conv2d(32,1,1)
    def forward(s,x):
        u=lambda t,r: F.interpolate(t,size=r.shape[-2:]); a=s.conv2(s.conv1(x)); b=s.conv3(a); c=s.conv4(b); d=s.conv5(c); z=s.center(s.pool(d)); z=s.dec5(torch.cat([u(z,d),d],1)); z=s.dec4(torch.cat([u(z,c),c],1)); z=s.dec3(torch.cat([u(z,b),b],1)); z=s.dec2(torch.cat([u(z,a),a],1)); return s.final(z)
case("ternausnet-resnet", Tern, IMG(), [r"^center",r"^dec",r"^final"],4)
# ResNet encoder, U-Net decoder
class Usu(nn.Module):
    def __init__(s):
        super().__init__(); s.base_model=R18(); b=list(s.base_model.children()); s.layer0=nn.Sequential(*b[:3]); s.layer0_1x1=nn.Conv2d(64,64,1); s.layer1=nn.Sequential(*b[3:5]); s.layer1_1x1=nn.Conv2d(64,64,1); s.layer2=b[5]; s.layer2_1x1=nn.Conv2d(128,128,1); s.layer3=b[6]; s.layer3_1x1=nn.Conv2d(256,256,1); s.layer4=b[7]; s.layer4_1x1=nn.Conv2d(512,512,1)
        s.conv_up3=cbr(768,64); s.conv_up2=cbr(192,64); s.conv_up1=cbr(128,64); s.conv_up0=cbr(128,32); s.conv_original_size0=cbr(3,16); s.conv_original_size2=cbr(48,16); s.conv_last=nn.Conv2d(16,2,1); s.upsample=nn.Upsample(scale_factor=2)
    def forward(s,x):
        o=s.conv_original_size0(x); l0=s.layer0(x); l1=s.layer1(l0); l2=s.layer2(l1); l3=s.layer3(l2); l4=s.layer4_1x1(s.layer4(l3)); y=s.conv_up3(torch.cat([s.upsample(l4),s.layer3_1x1(l3)],1)); y=s.conv_up2(torch.cat([s.upsample(y),s.layer2_1x1(l2)],1)); y=s.conv_up1(torch.cat([s.upsample(y),s.layer1_1x1(l1)],1)); y=s.conv_up0(torch.cat([s.upsample(y),s.layer0_1x1(l0)],1)); return s.conv_last(s.conv_original_size2(torch.cat([s.upsample(y),o],1)))
case("resnet-unet", Usu, IMG(), [r"conv_",r"1x1"],4)
# DETR demo
class DetrDemo(nn.Module):
    def __init__(s,h=32):
        super().__init__(); s.backbone=R18(); del s.backbone.fc; s.conv=nn.Conv2d(512,h,1); s.transformer=nn.Transformer(h,4,2,2,64); s.linear_class=nn.Linear(h,11); s.linear_bbox=nn.Linear(h,4); s.query_pos=nn.Parameter(torch.rand(10,h))
    def forward(s,x):
        b=s.backbone; x=b.layer4(b.layer3(b.layer2(b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(x)))))))); h=s.conv(x); h=s.transformer(h.flatten(2).permute(2,0,1),s.query_pos.unsqueeze(1).expand(-1,len(x),-1)).transpose(0,1); return {"pred_logits":s.linear_class(h),"pred_boxes":s.linear_bbox(h).sigmoid()}
case("detr-demo", DetrDemo, IMG(), [r"^(conv|transformer|linear|query)"],4)
# MoCo
class MoCo(nn.Module):
    def __init__(s):
        super().__init__(); s.encoder_q=torchvision.models.resnet18(num_classes=32); s.encoder_k=torchvision.models.resnet18(num_classes=32)
        for p in s.encoder_k.parameters(): p.requires_grad=False
        s.register_buffer("queue",torch.randn(32,64))
    def forward(s,im_q,im_k):
        q=F.normalize(s.encoder_q(im_q),dim=1)
        with torch.no_grad(): k=F.normalize(s.encoder_k(im_k),dim=1)
        return torch.cat([(q*k).sum(1,keepdim=True),q@s.queue],1)
case("moco", MoCo, lambda: (torch.randn(2,3,64,64),torch.randn(2,3,64,64)), [r"encoder_k",r"fc"])
class TCN(nn.Module):
    def __init__(s): super().__init__(); s.network=nn.Sequential(*[cbr(8 if i==0 else 16,16,3,1,nn.Conv1d) for i in range(4)]); s.linear=nn.Linear(16,3)
    def forward(s,x): return s.linear(s.network(x)[:,:,-1])
case("tcn", TCN, lambda: torch.randn(2,8,50), [r"^linear"],4)
class BertLike(nn.Module):
    def __init__(s):
        super().__init__(); from transformers import BertConfig,BertModel
        s.bert=BertModel(BertConfig(hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=24,vocab_size=50)); s.dropout=nn.Dropout(0.); s.fc=nn.Linear(16,3)
    def forward(s,input_ids,attention_mask): return s.fc(s.dropout(s.bert(input_ids,attention_mask=attention_mask).pooler_output))
case("bert-classifier-module", BertLike, lambda: (torch.zeros(2,6,dtype=torch.long),torch.ones(2,6,dtype=torch.long)), [r"^fc"],3)
class BertCRF(BertLike):
    def __init__(s): super().__init__(); s.lstm=nn.LSTM(16,8,batch_first=True,bidirectional=True)
    def forward(s,input_ids,attention_mask): return s.fc(s.lstm(s.bert(input_ids,attention_mask=attention_mask)[0])[0])
case("bert-bilstm", BertCRF, lambda: (torch.zeros(2,6,dtype=torch.long),torch.ones(2,6,dtype=torch.long)), [r"^fc",r"^lstm"],3)
class Hourglass(nn.Module):
    def __init__(s,n,c): super().__init__(); s.up1=cbr(c,c); s.low1=cbr(c,c); s.low2=Hourglass(n-1,c) if n>1 else cbr(c,c); s.low3=cbr(c,c)
    def forward(s,x): return s.up1(x)+F.interpolate(s.low3(s.low2(s.low1(F.max_pool2d(x,2)))),scale_factor=2)
class Pose(nn.Module):
    def __init__(s,c=16): super().__init__(); s.pre=nn.Sequential(cbr(3,c,7,2),cbr(c,c)); s.hgs=nn.ModuleList(Hourglass(3,c) for _ in range(2)); s.features=nn.ModuleList(cbr(c,c) for _ in range(2)); s.outs=nn.ModuleList(nn.Conv2d(c,16,1) for _ in range(2))
    def forward(s,x):
        x=s.pre(x); o=[]
        for h,f,q in zip(s.hgs,s.features,s.outs): y=f(h(x)); o.append(q(y)); x=x+y
        return torch.stack(o,1)
case("stacked-hourglass", Pose, IMG(), [r"^outs\.1"])
