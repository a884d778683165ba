"""Words of the classes of COCO, ADE20K, Cityscapes and PASCAL-Context, and their numbers in CLIP's
vocabulary: a word is cut into its tokens by itself, so a sentence has those of its words.

Source: the vocabulary of CLIP (Radford et al., ICML 2021), as openai/CLIP publishes it.
"""

_TABLE = """
    & 261; ' 262; ( 263; ) 264; , 267; - 268; . 269; / 270; 0 271; 1 272; 2 273; 3 274; 4 275;
    5 276; 6 277; 7 278; 8 279; 9 280; _ 318; a 320; aeroplane 27735 3980; airplane 16451; an 550;
    animal 4668; apparel 13972; apple 3055; arcade 13331; armchair 45757; ashcan 2067 753;
    automatic 12126; awning 808 762; background 5994; backpack 14894; bag 3365; ball 1069;
    balusters 38093 2132; balustrade 38093 48968; banana 8922; banister 1159 14555; banner 9185;
    bannister 1159 36640; bar 2411; barrel 11703; base 4579; baseball 3470; basket 10338; bat 6575;
    bathtub 39942; bear 4298; bed 2722; bedclothes 4152 7080; belt 7373; bench 8771; bicycle 11652;
    bill 2886; billiard 7693 746; bird 3329; blanket 12878; blind 8351; board 1972; boat 4440;
    book 1116; bookcase 2828 2068; booth 3971; bottle 5392; bowl 3814; box 2063; brick 9518;
    bridge 2465; broccoli 19094; buffet 17829; building 2307; bulletin 19638; bureau 15400;
    bus 2840; cabinet 9937; cake 2972; can 753; canopy 26061; car 1615; card 2601; cardboard 19845;
    carrot 15435; case 2068; cask 26299; cat 2368; ceiling 12374; cell 5533; chair 4269;
    chandelier 30570; chest 10563; class 1874; clock 6716; closet 14221; cloth 14559; clothes 7080;
    coffee 2453; column 10593; commode 610 6493; computer 11639 652; conveyer 18421 2371;
    conveyor 18421 21132; couch 12724; counter 7352; countertop 10134 1253; cover 2202;
    covered 5603; cow 9706; cradle 29384; crapper 1184 2440; crt 43877; cup 1937; curtain 17223;
    cushion 20853; desk 6550; dining 8658; dirt 11795; dishwasher 40524; display 4456; dog 1929;
    donut 18471; door 2489; drawers 38975; dresser 26346; drier 39877; drinking 5778; earth 3475;
    elephant 10299; escalator 15902 1962; exhaust 21812; falls 4778; fan 2261; fence 12679;
    field 1570; fire 1769; fireplace 23050; flag 4859; floor 4125; flower 4055; food 1559;
    foreground 35186; fork 13700; fountain 13405; frisbee 45768; fruit 5190; giraffe 22826;
    glass 3313; glove 16078; grandstand 43172; grass 5922; gravel 27054; ground 2461; hair 2225;
    handbag 22654; handbasket 1722 10338; handrail 1722 6879; hassock 9298 21313; hill 2682;
    hood 3222; horse 4558; hot 2069; house 1212; hovel 606 1287; hut 16503; hutch 33203;
    hydrant 8031 773; icebox 2739 2063; instance 34572; island 2619; keyboard 13017; kitchen 4485;
    kite 19867; knife 8960; lake 2553; lamp 10725; land 973; laptop 10464; light 1395;
    machine 4169; merged 46492; meter 10104; microwave 24240; minibike 1810 3701; mirror 7220;
    monitor 10198; motorbike 33341; motorcycle 10297; mount 5532; mountain 3965; mouse 9301;
    moving 3584; name 1981; net 2315; notice 6683; object 14115; objects 13770; of 539;
    orange 4287; other 1010; ottoman 27503; oven 12579; painting 3086; palm 8612;
    panoptic 1072 24755; paper 2802; parking 5984; path 5035; pavement 27669; pedestal 12862 5535;
    person 2533; phone 1951; photo 1125; picture 1674; pier 11348; pillar 17322; pillow 12182;
    pizza 4474; placard 2331 746; plane 5363; plant 3912; plate 5135; platform 5549;
    playingfield 47368 1570; plaything 1222 946; pole 8170; pool 2831; poster 3574; posting 7559;
    pot 5168; potted 48581; pottedplant 3547 4841 3912; potty 43569; pouf 9423 325;
    pouffe 9423 8631; press 2124; puff 17184; racket 37691; radiator 39372; rail 6879;
    railing 559 3299; railroad 17080; receiver 17659; refrigerator 36662; remote 9687; rider 9707;
    river 2473; road 1759; rock 2172; roof 6449; route 5261; rug 19220; runway 13927; sand 5094;
    sandwich 8687; scissors 30867; sconce 17163 629; screen 3750; sculpture 8757; sea 2102;
    seat 4922; semantic 29119 1550; shack 18785; shanty 5171 744; sheep 9629; shelf 10955;
    shelves 16225; ship 1158; showcase 7265; shower 7777; sideboard 5869 1972; sidewalk 23278;
    sign 2292; signboard 5538 1972; sink 14551; skateboard 31777; skis 32843; sky 2390;
    skyscraper 3075 11187 1284; snooker 25657; snow 2583; snowboard 33403; sofa 15723; soil 9216;
    solid 6148; span 14537; spoon 14024; sports 2054; stage 2170; stair 17662; staircase 22777;
    stairs 9577; stairway 45559; stand 2087; step 3348; stone 2441; stool 22314; stop 1691;
    storage 6824; stove 21423; street 2012; streetlight 4839 1395; stuff 3487; suitcase 27792;
    sunblind 968 8351; sunshade 968 10097; surfboard 10176 1972; swimming 7411; swivel 48256;
    table 2175; tank 6172; teddy 11798; television 8608; tennis 5298; tent 10782; terrain 20184;
    thing 946; throne 15999; tie 3422; tile 8227; toaster 39061; toilet 11071; toothbrush 36841;
    towel 15953; tower 4730; toy 5988; track 2700; trade 3629; traffic 3399; train 3231;
    transporter 43568; trash 9798; tray 14621; tree 2677; truck 4629; tub 15450; tv 1583;
    tvmonitor 3197 10198; umbrella 17143; van 2451; vase 20431; vegetation 33947;
    vitrine 4056 24952; wall 2569; wardrobe 15020; washer 24085; washing 13029; water 1573;
    waterfall 16403; window 4879; windowpane 26675 27470; wine 2604; with 593; wood 1704;
    zebra 22548;
"""
WORDS = {
    word: tuple(map(int, ids))
    for word, *ids in (entry.split() for entry in _TABLE.split(";") if entry.strip())
}
